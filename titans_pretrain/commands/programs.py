"""Other programs, of which a machine may lack any."""

import subprocess


def output_of(*command: str) -> str | None:
    """What a program prints; None if it is not there, fails, or does not answer within 20 s."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
