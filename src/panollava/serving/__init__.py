"""Using a trained model: on the command line and over HTTP."""
