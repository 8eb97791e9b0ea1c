"""How fast a server answers, and how fast it could at best."""
