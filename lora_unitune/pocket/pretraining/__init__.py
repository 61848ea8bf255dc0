"""How pocket is trained from nothing; not needed at run time."""
