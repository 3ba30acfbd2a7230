"""Tests in a virtual machine with pure cgroup v2 and systemd: its disk, the machine, the run. See README.md."""
