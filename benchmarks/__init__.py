"""Measurements that this project reports; each is made by a command and carries what made it."""
