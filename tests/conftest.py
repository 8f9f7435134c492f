import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before a test imports transformers: no test looks for a network
