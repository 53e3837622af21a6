"""The quality of a trained model: accuracy, nearest neighbours, a linear classifier, on any number of ranks."""
