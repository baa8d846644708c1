"""What is shared by the scripts and is no part of any algorithm."""
