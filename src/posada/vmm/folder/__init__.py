"""The server of a host folder that a guest mounts (virtio-fs): FUSE messages in, file system calls out.

A process of its own, beside the monitor; standard library only. It gets the folder as a descriptor and a socket, and
opens nothing by a path of more than one component: `tree` is where names become files, `server` the protocol.
"""
