# tapdisk attach in dom0: mkfs, mount, detach; partitions, read-only; killed and stopped under load, grown
. /xen-host/lib.sh

# attach ARGUMENT...: attaches a disk in the background; its device is $DEVICE.
attach() {
    DEVICE=$(tapdisk attach --fork --pid-file pid "$@") || fail "attach $*"
}
# tapdisk_ended: the tapdisk in the background has ended.
tapdisk_ended() { [ ! -e pid ] || ! kill -0 "$(cat pid)" 2> /dev/null; }
detach() {
    tapdisk detach "$DEVICE"
    wait_for 20 tapdisk_ended
    attach_gone
}
# After a failure: leaves nothing for later tests. What no longer exists cannot be undone.
clean_up() {
    local status=$?
    set +e
    if [ "$status" != 0 ]; then tail -n 20 tapdisk.log load.log err; dmesg | grep -i nbd | tail -n 20; fi
    {
        umount mnt
        exec 3>&-
        [ -z "${LOAD-}" ] || kill -9 "$LOAD"
        for n in 0 1 2 3; do tapdisk detach --force "/dev/nbd$n"; nbd-client -d "/dev/nbd$n"; done
        [ -z "${SERVER-}" ] || kill "$SERVER"
        kill "$(cat pid)"
    } > /dev/null 2>&1
    exit "$status"
}
trap clean_up EXIT
: > tapdisk.log > load.log > err

tap-img create -f qcow disk.qcow 64M
echo "# without the kernel's driver nothing is changed"
rmmod nbd 2> /dev/null || true
refused 19 'modprobe nbd' tapdisk attach "qcow:$PWD/disk.qcow"
[ -z "$(ls /run/tapdisk 2> /dev/null | grep '^nbd-')" ] || fail "a record is left"
modprobe nbd
modprobe crc32c_generic
modprobe ext4

echo "# a file system; a device in use is not detached"
dd if=/dev/urandom of=original bs=64k count=100 2> /dev/null
mkdir -p mnt
attach "qcow:$PWD/disk.qcow"
[ "$(cat "/sys/block/${DEVICE#/dev/}/size")" = 131072 ] || fail "its size is wrong"
mke2fs "$DEVICE" > mke2fs.log
mount -t ext4 "$DEVICE" mnt
cp original mnt/file
refused 16 "in use by the mount at $PWD/mnt" tapdisk detach "$DEVICE"
umount mnt
exec 4< "$DEVICE"
refused 16 "in use by process $$ (bash)" tapdisk detach "$DEVICE"
exec 4<&-
refused 11 'in use by another process' tapdisk attach "qcow:$PWD/disk.qcow"
detach
tap-img check disk.qcow

echo "# read-only, and at a device that is named"
attach --read-only --device /dev/nbd3 "qcow:$PWD/disk.qcow"
[ "$DEVICE $(cat /sys/block/nbd3/ro)" = "/dev/nbd3 1" ] || fail "$DEVICE is not read-only"
mount -t ext4 -o ro "$DEVICE" mnt
cmp original mnt/file
umount mnt
if dd if=/dev/zero of="$DEVICE" bs=4k count=1 2> /dev/null; then fail "a read-only device was written to"; fi
refused 16 '/dev/nbd3: .*in use' tapdisk attach --device nbd3 "raw:$PWD/original"
detach

echo "# partitions"
truncate -s 16M parts.raw
attach "raw:$PWD/parts.raw"
# One of type Linux, from sector 2048, of 8 MiB.
printf '\x00\x00\x00\x00\x83\x00\x00\x00\x00\x08\x00\x00\x00\x40\x00\x00' |
    dd of="$DEVICE" bs=1 seek=446 conv=notrunc 2> /dev/null
printf '\x55\xaa' | dd of="$DEVICE" bs=1 seek=510 conv=notrunc 2> /dev/null
detach
attach "raw:$PWD/parts.raw"
[ -b "${DEVICE}p1" ] || fail "there is no partition: $(ls /dev/nbd*)"
mke2fs "${DEVICE}p1" > mke2fs.log
mount -t ext4 "${DEVICE}p1" mnt
cp original mnt/file 2> /dev/null || true
refused 16 "in use by the mount at $PWD/mnt" tapdisk detach "$DEVICE"
umount mnt
detach

echo "# a device of another program is left alone"
tapdisk serve --nbd "unix:$PWD/socket" "raw:$PWD/parts.raw" > serve.log 2>&1 &
SERVER=$!
wait_for 20 grep -q '^listening' serve.log
nbd-client -unix "$PWD/socket" /dev/nbd2 > /dev/null
refused 1 'not of tapdisk' tapdisk detach /dev/nbd2
nbd-client -d /dev/nbd2 > /dev/null
kill "$SERVER"
wait "$SERVER" || fail "tapdisk serve ended with $?"
SERVER=

echo "# killed and stopped under load"
truncate -s 16M load.raw
start() { attach_start --pid-file pid "raw:$PWD/load.raw"; }
start
attach_wait
mkfifo stop
exec 3<> stop
disk-load verify "$DEVICE" --depth 8 --until-told < stop > load.log 2>&1 &
LOAD=$!
for signal in KILL KILL TERM; do
    load_goes_on
    tapdisk_again "$signal" start
done
start_larger() {
    truncate -s 20M load.raw
    start
}
load_goes_on
tapdisk_again KILL start_larger
load_goes_on
echo stop >&3
wait "$LOAD" || fail "the load: $(tail -n 5 load.log)"
LOAD=
exec 3>&-
tail -n 1 load.log
[ "$(cat "/sys/block/${DEVICE#/dev/}/size")" = 40960 ] || fail "the device has not grown"
[ "$(sort -u tapdisk.log | grep -c '^/dev/nbd[0-9]*$')" = 1 ] || fail "it had several devices: $(cat tapdisk.log)"
[ "$(hash_of "$DEVICE" 64k 0 256)" = "$(hash_of load.raw 64k 0 256)" ] || fail "the image has other data"
kill "$TAPDISK"
tapdisk_wait 0
[ ! -e "/sys/block/${DEVICE#/dev/}/pid" ] || fail "a device that nobody uses is left"
cat tapdisk.log
