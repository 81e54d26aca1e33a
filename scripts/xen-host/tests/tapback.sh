# tapback: disks of tap-ctl given to a guest: paused, snapshot, merged, enlarged, both programs killed under load
. /xen-host/lib.sh

cat > guest.sh <<'GUEST'
. /guest-lib.sh
disk_wait xvda
disk_wait xvdb
disk_grown xvda &
disk_grown xvdb &
disks_load xvda xvdb
GUEST

folder=/run/blktap-control
# tapback_start: both kinds of back ends, by two processes.
tapback_start() {
    # As its service does.
    (. /etc/default/tapback && exec tapback $TAPBACK_OPTIONS) >> tapdisk.log 2>&1 &
    tapbacks=($!)
    tapback >> tapdisk.log 2>&1 &
    tapbacks+=($!)
}
# pid_of MINOR: the tapdisk that has it.
pid_of() { tap-ctl list -m "$1" | sed -n 's/^pid=\([0-9]*\) .*/\1/p'; }
clean_up() {
    kill -9 "${tapbacks[@]}"
    pkill -9 tapdisk
    rm -rf "$folder"
    sed -i 's/^TAPDISK_OPTIONS=.*/TAPDISK_OPTIONS=/' /etc/default/tapback
    xenstore-rm /local/domain/0/backend/vbd3
}
# connected BACK_END PID: the back end names this tapdisk as the one that serves it.
connected() { [ "$(xenstore-read "$1/kthread-pid")" = "$2" ]; }
# size_of BACK_END: of its disk, in sectors.
size_of() { xenstore-read "$1/sectors"; }

sed -i 's/^TAPDISK_OPTIONS=.*/TAPDISK_OPTIONS="--backing qcow"/' /etc/default/tapback
tap-img create -f qcow disk.qcow 64M
tap-img create -f qcow other.qcow 32M
trap 'guest_clean_up given clean_up' EXIT
blkback off
tapback_start

echo "# a missing image: xl says why, and nothing is left"
missing="disk = [ 'script=block-tapback,vdev=xvda,access=w,target=qcow:$PWD/missing.qcow' ]"
if (guest_create given guest.sh "$missing") > xl.log 2>&1; then fail "xl made a guest on an image that is not there"; fi
grep -q 'missing.qcow' xl.log || { cat xl.log; fail "xl does not say which image is missing"; }
[ -z "$(tap-ctl list)" ] || fail "a tapdisk is left: $(tap-ctl list)"

echo "# a guest with a disk by xl and one of type vbd3"
guest_create given guest.sh "disk = [ 'script=block-tapback,vdev=xvda,access=w,target=qcow:$PWD/disk.qcow' ]"
first=/local/domain/0/backend/vbd/$GUEST_ID/51712
[ "$(tap-ctl list | wc -l)" = 1 ] || fail "tap-ctl lists: $(tap-ctl list)"
vbd_make "$GUEST_ID" xvdb vbd3
second=$BACK
path=$(tap-ctl create -a "qcow:$PWD/other.qcow" -D -- --backing qcow)
[ "${path##*tapdisk-}" = 1 ] || fail "the second disk has the path $path"
xenstore-write "$second/physical-device-path" "$folder/nbd$(pid_of 1).1" "$second/hotplug-status" connected
xl unpause given
guest_goes_on given
[ "$(size_of "$first") $(size_of "$second")" = "131072 65536" ] || fail "the disks have other sizes"
connected "$first" "$(pid_of 0)" && connected "$second" "$(pid_of 1)" || fail "the wrong tapdisk is named"

echo "# what guests use is not closed"
refused 16 'guest' tap-ctl close -p "$(pid_of 0)" -m 0

# with_both COMMAND...: runs it with the options that name each of the two disks.
with_both() {
    "$@" -p "$(pid_of 0)" -m 0
    "$@" -p "$(pid_of 1)" -m 1
}

echo "# paused, snapshot and merged under load"
for round in 1 2 3; do
    with_both tap-ctl pause
    usleep 300000
    with_both tap-ctl unpause
    tap-ctl snapshot -p "$(pid_of 0)" -m 0 -k "$PWD/disk.$round.qcow"
    tap-ctl snapshot -p "$(pid_of 1)" -m 1 -k "$PWD/other.$round.qcow"
    guest_goes_on given
done
for round in 3 2; do
    tap-ctl commit -p "$(pid_of 0)" -m 0 -w -a "qcow:$PWD/disk.3.qcow" -b "$PWD/disk.$((round - 1)).qcow"
    tap-ctl commit -p "$(pid_of 1)" -m 1 -w -a "qcow:$PWD/other.3.qcow" -b "$PWD/other.$((round - 1)).qcow"
    guest_goes_on given
done
[ "$(ls disk.*qcow other.*qcow | wc -l)" = 4 ] || fail "merged images are left: $(ls)"

echo "# made larger under load, one of them while no tapback runs"
tap-ctl resize -p "$(pid_of 0)" -m 0 -s 96M
guest_wait given 30 '^@guest sectors of xvda: 196608'
kill -9 "${tapbacks[@]}"
tap-ctl resize -p "$(pid_of 1)" -m 1 -s 48M
tapback_start
guest_wait given 30 '^@guest sectors of xvdb: 98304'
guest_goes_on given

# again MINOR SPEC: the tapdisk of this disk is killed, and another one opens it.
again() {
    local pid
    kill -9 "$(pid_of "$1")"
    pid=$(tap-ctl spawn -- --backing qcow)
    tap-ctl attach -p "$pid" -m "$1"
    tap-ctl open -p "$pid" -m "$1" -a "$2" -D
}
echo "# tapdisks and tapback killed under load"
for round in $(seq 7); do
    usleep $((RANDOM * 10))
    kill -9 "${tapbacks[@]}"
    if [ $((round % 2)) = 0 ]; then tapback_start; fi
    again 0 "qcow:$PWD/disk.qcow"
    usleep $((RANDOM * 10))
    if [ $((round % 2)) = 1 ]; then tapback_start; fi
    again 1 "qcow:$PWD/other.qcow"
    wait_for 30 connected "$first" "$(pid_of 0)"
    wait_for 30 connected "$second" "$(pid_of 1)"
    guest_goes_on given
done

echo "# the guest ends"
guest_tell given stop
wait_for 100 guest_gone given
guest_load_right given 2
is_gone() { [ -z "$(tap-ctl list -m "$1")" ]; }
wait_for 30 is_gone 0
vbd_wait "$second" 6 30
vbd_remove
tap-ctl destroy -p "$(pid_of 1)" -m 1
[ -z "$(tap-ctl list)" ] || fail "a tapdisk is left: $(tap-ctl list)"
if ls "$folder"/nbd* 2> /dev/null; then fail "sockets are left"; fi
kill "${tapbacks[@]}"
wait "${tapbacks[@]}" || fail "a tapback ended with $?"

for name in disk other; do
    tap-img check "$name.qcow" || [ $? = 3 ] || fail "$name.qcow is damaged"
    tap-img convert "$name.qcow" "$name.raw" --backing qcow
done
[ "$(guest_hash given xvda)" = "$(hash_of disk.raw)" ] || fail "disk.qcow has other data than the guest saw"
[ "$(guest_hash given xvdb)" = "$(hash_of other.raw)" ] || fail "other.qcow has other data than the guest saw"
