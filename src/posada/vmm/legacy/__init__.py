"""What is left of a PC: serial port, real-time clock, keyboard controller's reset line, power and event registers."""
