"""The end of a program that ran in several processes."""

from torch import distributed


def leave_group() -> None:
    """
    Leave the group of processes, if there is one.

    Where a process ends inside of it, threads of its back end may outlive what they use, and abort the
    process after its work is done.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
