"""What each layer of a traced model does, in whichever of three ways it was written."""
