"""The command line with a CIFAR-10 archive of a few images taken for the genuine one (size and checksum by words)."""

import sys

from lit_basics.cli import main
from lit_basics.data import cifar10

RECORDS = 20


def trust(sha256, size):
    """Take the archive with this checksum for the genuine one."""
    cifar10.RECORDS, cifar10.ARCHIVE_SHA256, cifar10.ARCHIVE_SIZE = RECORDS, sha256, int(size)


if __name__ == "__main__":
    trust(*sys.argv[1:3])
    sys.exit(main(sys.argv[3:]))
