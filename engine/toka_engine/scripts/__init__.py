"""Small commands beside `toka`."""
