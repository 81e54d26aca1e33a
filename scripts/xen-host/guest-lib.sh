# Functions for scripts in guests, which have busybox's sh:  . /guest-lib.sh

# disk_wait NAME: waits until the disk /dev/NAME exists.
disk_wait() {
    local left=150
    until [ -b "/dev/$1" ]; do
        left=$((left - 1))
        [ "$left" -gt 0 ] || { dmesg | tail -n 20; return 1; }
        usleep 200000
    done
    echo "@guest sectors of $1: $(cat "/sys/block/$1/size")"
}

# disk_grown NAME: waits until the disk has another size.
disk_grown() {
    local before
    before=$(cat "/sys/block/$1/size")
    while [ "$(cat "/sys/block/$1/size")" = "$before" ]; do
        usleep 200000
    done
    echo "@guest sectors of $1: $(cat "/sys/block/$1/size")"
}

# disk_gone NAME: waits until the disk is gone.
disk_gone() {
    local left=150
    while [ -e "/sys/block/$1" ]; do
        left=$((left - 1))
        [ "$left" -gt 0 ] || { dmesg | tail -n 20; return 1; }
        usleep 200000
    done
}

# disk_write_read NAME: writes 4 MiB bypassing the page cache, flushes, and reads them back the same way.
disk_write_read() {
    dd if=/dev/urandom of=/tmp/written bs=64k count=64 2> /dev/null
    dd if=/tmp/written of="/dev/$1" bs=64k seek=3 oflag=direct conv=notrunc,fsync 2> /dev/null
    dd if="/dev/$1" of=/tmp/read bs=64k skip=3 count=64 iflag=direct 2> /dev/null
    cmp /tmp/written /tmp/read
}

# disk_new_fs NAME: makes a file system and puts a file into it, /tmp/original; then as disk_old_fs.
disk_new_fs() {
    dd if=/dev/urandom of=/tmp/original bs=64k count=50 2> /dev/null
    mke2fs "/dev/$1" > /dev/null
    modprobe crc32c_generic
    modprobe ext4
    mount -t ext4 "/dev/$1" /mnt
    cp /tmp/original /mnt/file
    sha256sum < /tmp/original > /mnt/sum
    umount /mnt
    disk_old_fs "$1"
}

# disk_old_fs NAME: mounts the existing file system, and compares its file with the original.
disk_old_fs() {
    modprobe crc32c_generic
    modprobe ext4
    mount -t ext4 -o ro "/dev/$1" /mnt
    [ "$(cat /mnt/sum)" = "$(sha256sum < /mnt/file)" ] || { umount /mnt; echo "the file has changed"; return 1; }
    umount /mnt
}

# disk_hash NAME: prints the sha256 of the whole disk, in the form that guest_hash of dom0's lib.sh expects.
disk_hash() {
    echo "@guest sha256 of $1: $(dd if="/dev/$1" bs=128k iflag=direct 2> /dev/null | sha256sum | cut -d ' ' -f 1)"
}

# disks_load DISK OTHER: disk-load on both disks at the same time, until it is told on the console to stop; then their
# hashes.
disks_load() {
    # Open at both ends, so that neither side waits for the other.
    mkfifo /tmp/stop
    exec 3<> /tmp/stop
    disk-load verify "/dev/$2" --depth 2 --until-told --seed 2 < /tmp/stop > /tmp/other 2>&1 &
    local other=$!
    disk-load verify "/dev/$1" --depth 8 --until-told
    echo stop >&3
    wait "$other" || { tail -n 20 /tmp/other; return 1; }
    tail -n 1 /tmp/other
    disk_hash "$1"
    disk_hash "$2"
}
