"""Private fine-tuning of pretrained Keras models."""
