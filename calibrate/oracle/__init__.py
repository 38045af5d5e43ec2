"""The real libraries under fake tensors: what the program is checked against."""
