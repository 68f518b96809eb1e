"""Find, test and remove what a fine-tune changed in a language model."""
