"""Facts from files and from the user: the catalogue, model sources, calibrations, measurements."""
