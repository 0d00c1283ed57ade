"""Online learning trains a compressed model on a stream, and undoes updates that raise the validation loss."""
