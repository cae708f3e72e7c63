"""Claims of longspan, each with the script that checks it and the raw log of its runs."""
