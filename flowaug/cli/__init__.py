"""The command flowaug."""
