"""What answers for the robot: the server, the twin's scripted expert, or chance."""
