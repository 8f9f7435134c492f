"""The dual form in torch, any device: exact, linear in T, with a hand-written backward pass. Start with scan.py."""
