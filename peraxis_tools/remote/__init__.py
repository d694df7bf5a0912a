"""Files at URLs and on the hub."""
