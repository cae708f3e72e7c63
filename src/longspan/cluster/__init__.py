"""Know the cluster: what it is made of, what an op costs on it, how schedules play out."""
