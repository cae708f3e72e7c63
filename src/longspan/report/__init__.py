"""Tables, plots and self-contained pages; needs only plans and traces."""
