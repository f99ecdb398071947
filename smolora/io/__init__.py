"""Files and text that leave or enter the program."""
