"""Decides how a job is spread, from what the cluster, the data and the model are."""
