# the kernel's nbd driver on tapdisk: qcow made, mounted, a file copied in and out, detached, checked
. /xen-host/lib.sh

modprobe nbd
# ext4 requests it by an alias, which is not in the list of modules here.
modprobe crc32c_generic
modprobe ext4
server=
# After a failure: leaves nothing for later tests. What no longer exists cannot be undone.
clean_up() {
    set +e
    umount mnt
    nbd-client -d /dev/nbd0
    [ -z "$server" ] || kill "$server"
} > /dev/null 2>&1
trap clean_up EXIT

tap-img create -f qcow disk.qcow 64M
dd if=/dev/urandom of=original bs=64k count=100 2> /dev/null

serve() {
    tapdisk serve --nbd unix:$PWD/socket qcow:disk.qcow > serve.log 2>&1 &
    server=$!
    wait_for 20 grep -q '^listening' serve.log
}
has_size() { [ "$(cat /sys/block/nbd0/size)" = 131072 ]; }
attach() {
    nbd-client -unix "$PWD/socket" /dev/nbd0
    wait_for 10 has_size
}
detach() {
    nbd-client -d /dev/nbd0
    wait_for 10 test ! -e /sys/block/nbd0/pid
    kill "$server"
    wait "$server" || fail "tapdisk ended with $?: $(cat serve.log)"
    server=
}

serve
attach
mke2fs /dev/nbd0 > mke2fs.log
mkdir -p mnt
mount -t ext4 /dev/nbd0 mnt
cp original mnt/file
umount mnt
detach
tap-img check disk.qcow

# A new server and a new connection: reads now come from the image.
serve
attach
mount -t ext4 -o ro /dev/nbd0 mnt
cp mnt/file copy
umount mnt
detach

[ "$(hash_of original)" = "$(hash_of copy)" ] || fail "the file came back changed"
tap-img check disk.qcow
tap-img info disk.qcow
