"""What engines share: processes by pid and start time, cgroups, uids, probing /dev/kvm. Knows no engine."""
