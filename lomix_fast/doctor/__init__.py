"""`python -m lomix_fast doctor`: what is installed, what runs where, and whether it is right and how fast."""
