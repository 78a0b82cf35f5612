"""Numbers in; tables on the screen, a JSON file and one self-contained page out. Knows nothing of models."""
