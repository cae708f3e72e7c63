"""An emulated slow cluster on one Linux machine: shaped links, devices of fixed speed."""
