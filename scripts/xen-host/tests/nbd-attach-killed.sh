# tapdisk attach ended twenty times by SIGKILL, once by SIGTERM, and started again: the load on its device only waits
. /xen-host/lib.sh

clean_up() {
    local status=$?
    set +e
    if [ "$status" != 0 ]; then tail -n 20 tapdisk.log load.log; dmesg | grep -i nbd | tail -n 20; fi
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
: > tapdisk.log > load.log
start() { attach_start --device "$DEVICE" "qcow:$PWD/disk.qcow"; }
start
attach_wait
mkfifo stop
exec 3<> stop
disk-load verify "$DEVICE" --depth 16 --until-told < stop > load.log 2>&1 &
LOAD=$!
tapdisk_killed_often load_goes_on start
echo stop >&3
wait "$LOAD" || fail "the load: $(tail -n 5 load.log)"
LOAD=
tail -n 1 load.log
grep -q '^@load compared .*MISMATCHES 0$' load.log || fail "the load"
seen=$(hash_of "$DEVICE")
tapdisk detach "$DEVICE"
tapdisk_wait 0
TAPDISK=
attach_gone
qcow_same "$seen"
