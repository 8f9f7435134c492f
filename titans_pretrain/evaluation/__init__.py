"""What a trained model is worth: one file per task, all behind tasks.py, all reading the model through model.py."""
