"""Drop-ins for other libraries, one file per library; importing one needs that library."""
