"""Studio: a local web page on a model, on which every analysis has its cost, picture, control and interval."""
