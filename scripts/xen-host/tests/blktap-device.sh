# a disk as a block device through a blktap2 module: mounted, in use, killed, made again, detached (--blktap-module)
# test program: tap-linux tap
. /xen-host/lib.sh

if [ ! -f /xen-host/blktap.ko ]; then
    echo "there is no module: name one with --blktap-module"
    exit 77
fi
[ -d /sys/module/blktap ] || insmod /xen-host/blktap.ko
modprobe crc32c_generic
modprobe ext4
server=
clean_up() {
    set +e
    umount mnt
    [ -z "$server" ] || kill -9 "$server"
    sleep 1
    rmmod blktap
} > /dev/null 2>&1
trap clean_up EXIT

# attach: starts tapdisk; sets $server and $device.
attach() {
    tapdisk attach --via blktap qcow:disk.qcow > attach.log 2> attach.err &
    server=$!
    wait_for 20 grep -q '^/dev/xen/blktap-2/tapdev' attach.log
    device=$(head -n 1 attach.log)
    echo "attached: $device"
}
# ended: waits for its end, which must be a good one.
ended() {
    wait "$server" || fail "tapdisk ended with $?: $(cat attach.err)"
    server=
}
minors() { ls /sys/class/blktap2 2> /dev/null | grep -c '^blktap[0-9]' || true; }
# Numbers that the module has kept in this boot.
kept=$(minors)

tap-linux-tap --color never 2>&1 | tee log || fail "some bodies"
grep -q ' 0 ignored;' log || fail "some bodies did not run"

tap-img create -f qcow disk.qcow 64M
dd if=/dev/urandom of=original bs=64k count=100 2> /dev/null

attach
[ "$(blockdev --getsize64 "$device")" = 67108864 ] || fail "the device has another size"
mke2fs "$device" > mke2fs.log
mkdir -p mnt
mount -t ext4 "$device" mnt
cp original mnt/file
sync
# It is in use, so it is served on.
kill "$server"
wait_for 10 grep -q 'in use' attach.log
cp original mnt/again
umount mnt
ended
tap-img check disk.qcow
[ "$(minors)" = "$kept" ] || fail "a minor is left"

# Killed between two users: what was answered is there for the next one, which frees what the dead one left. (OpenXT's
# module follows a null pointer if somebody has the device of a dead process open and reads or writes it.)
attach
first=$device
mount -t ext4 "$device" mnt
cp original mnt/third
umount mnt
kill -9 "$server"
wait "$server" || true
sleep 1
attach
[ "$device" = "$first" ] || fail "the minor of the dead tapdisk was not freed: $device"
mount -t ext4 "$device" mnt
[ "$(hash_of original)" = "$(hash_of mnt/file)" ] || fail "a file came back changed"
[ "$(hash_of original)" = "$(hash_of mnt/again)" ] || fail "a file that was copied later came back changed"
[ "$(hash_of original)" = "$(hash_of mnt/third)" ] || fail "a file that was copied before the death came back changed"
umount mnt
kill "$server"
ended
tap-img check disk.qcow
[ "$(minors)" = "$kept" ] || fail "a minor is left in the end"

# The module asks for the end of the device. It keeps the number, and so cannot be unloaded afterwards.
attach
minor=${device##*tapdev}
grep -q '^tapdisk-' "/sys/class/blktap2/blktap$minor/name" || fail "the device has no name of ours"
mount -t ext4 "$device" mnt
echo 1 > "/sys/class/blktap2/blktap$minor/remove" &
asker=$!
wait_for 10 grep -q 'in use' attach.log
[ "$(hash_of original)" = "$(hash_of mnt/file)" ] || fail "a device that should end is not served"
umount mnt
ended
grep -q 'keeps its number until the host is started again' attach.log || fail "that its number is lost is not said"
[ "$(minors)" = $((kept + 1)) ] || fail "the module does not keep the number of a device that it was asked to close"
kill -INT "$asker" 2> /dev/null || true
kill -9 "$asker" 2> /dev/null || true
wait "$asker" || true
[ -z "$(ls /run/tapdisk 2> /dev/null | grep '^tap-' || true)" ] || fail "a record is left"
