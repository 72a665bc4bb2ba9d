"""The web service: it serves the models of the store and runs training and evaluation jobs."""
