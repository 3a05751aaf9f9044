"""A small trained Mixtral to try everything on, the text it learned from, and the script that trained it."""
