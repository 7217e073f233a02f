/* The end of the machine. */
#ifndef POSADA_POWER_H
#define POSADA_POWER_H

/* A signal to PID 1: some ask for a power-off or a reboot. Off PID 1, SIGTERM and SIGINT end the agent. */
void power_signal(int signal);
/* No child is left: what a power-off waits for. */
void power_alone(void);

#endif
