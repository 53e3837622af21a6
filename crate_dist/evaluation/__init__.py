"""How good a trained model is: accuracy, nearest neighbours, a linear classifier, on any number of ranks."""
