# tapdisk attach ended twenty times by SIGKILL, once by SIGTERM, and started again: the load on its device only waits
. /xen-host/lib.sh

clean_up() {
    local status=$?
    set +e
    if [ "$status" != 0 ]; then tail -n 20 attach.log load.log; dmesg | grep -i nbd | tail -n 20; fi
    {
        [ -z "${LOAD-}" ] || kill -9 "$LOAD"
        [ -z "${TAPDISK-}" ] || kill -9 "$TAPDISK"
        tapdisk detach --force "$DEVICE"
    } > /dev/null 2>&1
    exit "$status"
}
trap clean_up EXIT
DEVICE=/dev/nbd5

modprobe nbd
tap-img create -f qcow disk.qcow 32M
: > attach.log > load.log
start() {
    tapdisk attach --device "$DEVICE" "qcow:$PWD/disk.qcow" >> attach.log 2>&1 &
    TAPDISK=$!
}
start
wait_for 20 grep -q "^$DEVICE$" attach.log
mkfifo stop
exec 3<> stop
disk-load verify "$DEVICE" --depth 16 --until-told < stop > load.log 2>&1 &
LOAD=$!
for n in $(seq 21); do
    if [ $((n % 4)) != 0 ]; then wait_for 60 has_done_more_than "$(done_requests)"; fi
    # # Some are killed while they take up the device.
    usleep $((RANDOM * 10))
    signal=KILL status=137
    if [ "$n" = 11 ]; then signal=TERM status=0; fi
    kill -s "$signal" "$TAPDISK"
    tapdisk_wait "$status"
    echo "tapdisk ended by SIG$signal, $n of 21, after $(done_requests) requests"
    start
done
wait_for 60 has_done_more_than "$(done_requests)"
echo stop >&3
wait "$LOAD" || fail "the load: $(tail -n 5 load.log)"
LOAD=
tail -n 1 load.log
grep -q '^@load compared .*MISMATCHES 0$' load.log || fail "the load"
seen=$(hash_of "$DEVICE")
tapdisk detach "$DEVICE"
tapdisk_wait 0
TAPDISK=
# Clusters whose write was under way when tapdisk was killed may be lost to the file, which is harmless: status 3.
tap-img check disk.qcow || [ $? = 3 ] || fail "the image is damaged"
tap-img convert disk.qcow disk.raw
[ "$seen" = "$(hash_of disk.raw)" ] || fail "the image has other data than the device had"
