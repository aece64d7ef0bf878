"""`python -m lomix_fast demo`: train on real brain MRI, then measure the loss against the official style."""
