"""Sites that train apart and synchronise now and then: Streaming DiLoCo."""
