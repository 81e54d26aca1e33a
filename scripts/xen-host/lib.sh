# Functions for scripts in dom0:  . /xen-host/lib.sh

# fail MESSAGE: ends the script.
fail() {
    echo "failed: $*" >&2
    exit 1
}

# wait_for SECONDS COMMAND...: waits until the command succeeds.
wait_for() {
    local left=$(($1 * 5))
    shift
    until "$@" > /dev/null 2>&1; do
        left=$((left - 1))
        [ "$left" -gt 0 ] || fail "waited too long for: $*"
        usleep 200000
    done
}

# hash_of FILE [BLOCK_SIZE SKIP COUNT]: sha256 of a file or of a range of it.
hash_of() {
    if [ $# = 1 ]; then
        sha256sum < "$1" | cut -d ' ' -f 1
    else
        dd if="$1" bs="$2" skip="$3" count="$4" 2> /dev/null | sha256sum | cut -d ' ' -f 1
    fi
}

# guest_create NAME SCRIPT [LINE...]: makes a paused PV guest that runs SCRIPT (with sh -eu) and powers off. Each LINE
# goes into its xl configuration: disk = [ 'phy:/dev/loop0,xvda,w' ]. Its domain id is in $GUEST_ID. SCRIPT has the
# functions of guest-lib.sh, and the program disk-load.
guest_create() {
    local name=$1 script=$2 folder
    shift 2
    folder=/tmp/guest-$name
    rm -rf "$folder" "/var/log/xen/guest-$name.log"
    mkdir -p "$folder/root/usr/bin"
    cp /xen-host/domu-init "$folder/root/init"
    cp /xen-host/guest-lib.sh "$folder/root"
    [ ! -f /usr/local/bin/disk-load ] || cp /usr/local/bin/disk-load "$folder/root/usr/bin"
    cp "$script" "$folder/root/run.sh"
    # Concatenated archives: files of the later one replace those of the earlier one.
    (cd "$folder/root" && find . | cpio -o -H newc 2> /dev/null) | cat /domu/base.cpio - > "$folder/initrd"
    {
        printf '%s\n' "name = '$name'" "type = 'pv'" "kernel = '/domu/vmlinux'" "ramdisk = '$folder/initrd'"
        printf '%s\n' "extra = 'console=hvc0 quiet'" "memory = 192" "vcpus = 1"
        printf '%s\n' "on_poweroff = 'destroy'" "on_crash = 'destroy'" "on_reboot = 'restart'" "$@"
    } > "$folder/config"
    xl create -p "$folder/config" || fail "create guest $name"
    GUEST_ID=$(xl domid "$name")
}

guest_gone() { ! xl domid "$1"; }

# guest_log NAME: prints what it wrote to its console.
guest_log() { tr -d '\r' < "/var/log/xen/guest-$1.log"; }

# guest_run NAME SECONDS: runs it to its end, shows its console; succeeds if its script did.
guest_run() {
    xl unpause "$1"
    wait_for "$2" guest_gone "$1"
    guest_log "$1"
    guest_log "$1" | grep -q '^@guest exit 0$'
}

guest_said() { guest_log "$1" | grep -q -- "$2"; }

# guest_wait NAME SECONDS PATTERN: waits until it has printed a matching line.
guest_wait() {
    wait_for "$2" guest_said "$1" "$3"
}

# guest_tty NAME: prints the terminal of its console.
guest_tty() { xenstore-read "/local/domain/$(xl domid "$1")/console/tty"; }

# guest_tell NAME LINE: writes a line to its console, as if typed.
guest_tell() { echo "$2" > "$(guest_tty "$1")"; }

# guest_hash NAME DISK: prints the sha256 that its disk_hash printed last.
guest_hash() { guest_log "$1" | sed -n "s/^@guest sha256 of $2: //p" | tail -n 1; }

# load_requests: prints how many requests a disk-load has done, by the last report on standard input.
load_requests() {
    local done
    done=$(sed -n 's/^@load goes on: requests \([0-9]*\),.*/\1/p' | tail -n 1)
    echo "${done:-0}"
}

# done_requests: prints those of a disk-load in dom0, whose output is in load.log.
done_requests() { load_requests < load.log; }

has_done_more_than() { [ "$(done_requests)" -gt "$1" ]; }

# load_goes_on: waits until it has done more.
load_goes_on() { wait_for 60 has_done_more_than "$(done_requests)"; }

# guest_requests NAME: prints those of the guest's disk-load.
guest_requests() { guest_log "$1" | load_requests; }

guest_has_done_more() { [ "$(guest_requests "$1")" -gt "$2" ]; }

# guest_goes_on NAME: waits until its disk-load has done more. The first report after a restart may be from before it;
# the second one shows that the load continues.
guest_goes_on() {
    for report in 1 2; do
        wait_for 100 guest_has_done_more "$1" "$(guest_requests "$1")"
    done
}

# guest_load_right NAME COUNT: COUNT loads of the guest, which is gone, have compared everything and found no
# mismatch, and its script has ended well.
guest_load_right() {
    guest_log "$1" | grep -v 'goes on'
    [ "$(guest_log "$1" | grep -c '^@load compared .*MISMATCHES 0$')" = "$2" ] || fail "the guest's load"
    guest_said "$1" '^@guest exit 0$' || fail "the guest's script"
}

# qcow_same HASH: disk.qcow is intact, and has the data with this hash. Clusters whose write was under way when
# tapdisk was killed may be lost to the file, which is harmless: status 3.
qcow_same() {
    tap-img check disk.qcow || [ $? = 3 ] || fail "the image is damaged"
    tap-img convert disk.qcow disk.raw
    [ -n "$1" ] && [ "$1" = "$(hash_of disk.raw)" ] || fail "the image has other data than its user saw"
}

# blkback on|off: loads or unloads the kernel's own back end. It takes every vbd whose type is `vbd`.
blkback() {
    case $1 in
        on) modprobe xen-blkback ;;
        off) if [ -d /sys/module/xen_blkback ]; then rmmod xen_blkback; fi ;;
    esac
}

# blkback_serves_none: it has no vbd, and there is none in xenstore.
blkback_serves_none() {
    ! ls /sys/bus/xen-backend/devices/vbd-* > /dev/null 2>&1 &&
        [ -z "$(xenstore-list /local/domain/0/backend/vbd 2> /dev/null)" ]
}

# vbd_number DISK: xvda is 51712, and each letter 16 further (a disk has 16 minor numbers).
vbd_number() {
    local letters=abcdefghijklmnop before
    before=${letters%%"${1#xvd}"*}
    echo $((51712 + 16 * ${#before}))
}

# vbd_make DOMAIN_ID DISK [TYPE]: makes the nodes of a disk, as a toolstack does, without xl. The domain may already
# be running. TYPE is the directory of the back end (vbd); any name will do that no other back end claims. Sets $BACK
# and $FRONT to the two directories.
vbd_make() {
    local domain=$1 number
    number=$(vbd_number "$2")
    BACK=/local/domain/0/backend/${3:-vbd}/$domain/$number
    FRONT=/local/domain/$domain/device/vbd/$number
    # Nodes made below a directory inherit its permissions: n is the owner, r may read.
    xenstore-write "$BACK" "" "$FRONT" ""
    xenstore-chmod "$BACK" n0 "r$domain"
    xenstore-chmod "$FRONT" "n$domain" r0
    xenstore-write "$BACK/frontend" "$FRONT" "$BACK/frontend-id" "$domain" "$BACK/online" 1 "$BACK/removable" 0 \
        "$BACK/mode" w "$BACK/device-type" disk "$BACK/dev" "$2" "$BACK/state" 1
    xenstore-write "$FRONT/backend" "$BACK" "$FRONT/backend-id" 0 "$FRONT/virtual-device" "$number" \
        "$FRONT/device-type" disk "$FRONT/state" 1
}

vbd_has_state() { [ "$(xenstore-read "$1/state")" = "$2" ]; }

# vbd_wait DIRECTORY STATE SECONDS: waits until that end is in that state (4: connected, 6: closed).
vbd_wait() { wait_for "$3" vbd_has_state "$1" "$2"; }

# vbd_unplug: asks both ends of $BACK and $FRONT to close, and waits for it.
vbd_unplug() {
    xenstore-write "$BACK/online" 0 "$BACK/state" 5
    vbd_wait "$BACK" 6 30
}

# vbd_remove: removes the nodes of $BACK and $FRONT. Those of a guest that is gone are already gone.
vbd_remove() {
    xenstore-rm "$FRONT" 2> /dev/null || true
    # Including parent directories that are then empty.
    xenstore-rm -t "$BACK"
}

# tapdisk_start ARGUMENT...: starts `tapdisk xen ARGUMENT...` in the background; its process is $TAPDISK, and its
# output is added to ./tapdisk.log.
tapdisk_start() {
    tapdisk xen "$@" >> tapdisk.log 2>&1 &
    TAPDISK=$!
}

# attach_start ARGUMENT...: starts `tapdisk attach ARGUMENT...` in the same way.
attach_start() {
    tapdisk attach "$@" >> tapdisk.log 2>&1 &
    TAPDISK=$!
}

# attach_wait: waits for the device of an attach_start; its name is $DEVICE.
attach_wait() {
    wait_for 20 grep -q '^/dev/[^:]*$' tapdisk.log
    DEVICE=$(grep -m 1 '^/dev/[^:]*$' tapdisk.log)
}

# attach_gone: no device of tapdisk, no record of one and no tapdisk is left.
attach_gone() {
    [ ! -e "/sys/block/${DEVICE##*/}/pid" ] || fail "$DEVICE is still there"
    [ -z "$(ls /run/tapdisk | grep -E '^(nbd|tap)-')" ] || fail "a record is left: $(ls /run/tapdisk)"
    if pidof tapdisk; then fail "a tapdisk is left"; fi
}

# refused STATUS WORDS COMMAND...: the command fails with this status, and says these words in one line.
refused() {
    local wanted=$1 words=$2 status=0
    shift 2
    "$@" > out 2> err || status=$?
    [ "$status" = "$wanted" ] || fail "$* ended with $status: $(cat out err)"
    [ "$(wc -l < err)" = 1 ] && grep -q -- "$words" err || fail "$* says: $(cat err)"
    cat err
}

# tapdisk_again SIGNAL COMMAND...: ends tapdisk by SIGNAL (KILL, TERM), and starts it again by the command.
tapdisk_again() {
    local signal=$1 status=137
    shift
    [ "$signal" = KILL ] || status=0
    kill -s "$signal" "$TAPDISK"
    tapdisk_wait "$status"
    echo "tapdisk ended by SIG$signal"
    "$@"
}

# tapdisk_killed_often WAIT COMMAND...: twenty times SIGKILL and once SIGTERM, and each time started again by the
# command. WAIT is a command that returns when the load on the disk has gone on.
tapdisk_killed_often() {
    local wait=$1 n signal
    shift
    for n in $(seq 21); do
        if [ $((n % 4)) != 0 ]; then "$wait"; fi
        # Up to a third of a second: some are killed while they take over the disk.
        usleep $((RANDOM * 10))
        signal=KILL
        if [ "$n" = 11 ]; then signal=TERM; fi
        tapdisk_again "$signal" "$@"
    done
    "$wait"
}

# tapdisk_wait [STATUS]: waits until it has ended, with that status (0).
tapdisk_wait() {
    local status=0 left=150
    # Without the shell's own message about a killed process.
    while [ "$left" -gt 0 ] && kill -0 "$TAPDISK"; do
        left=$((left - 1))
        usleep 200000
    done 2> /dev/null
    [ "$left" -gt 0 ] || fail "waited too long for tapdisk to end: $(tail -n 20 tapdisk.log)"
    wait "$TAPDISK" 2> /dev/null || status=$?
    TAPDISK=
    [ "$status" = "${1-0}" ] || fail "tapdisk ended with $status: $(tail -n 20 tapdisk.log)"
}

# guest_clean_up NAME [COMMAND...]: at the end of a test. After a failure it shows logs and xenstore; it removes
# everything of the guest, runs the command, and exits with the status that it found.
guest_clean_up() {
    local status=$? name=$1
    shift
    trap - EXIT
    set +e
    if [ "$status" != 0 ]; then
        echo "--- tapdisk says"
        tail -n 40 tapdisk.log
        echo "--- guest $name says"
        guest_log "$name" | tail -n 40
        echo "--- xenstore has"
        xenstore-ls -f /local/domain/0/backend
        xenstore-ls -f "/local/domain/$(xl domid "$name" 2> /dev/null)/device/vbd"
    fi
    {
        [ -z "${TAPDISK-}" ] || kill -9 "$TAPDISK"
        xl destroy "$name"
        # All disks of the guest.
        [ -z "${BACK-}" ] || xenstore-rm -t "${BACK%/*}"
        "$@"
    } > /dev/null 2>&1
    exit "$status"
}

# guest_on_image NAME SCRIPT SPEC SECONDS: runs a guest to its end. Its xvda is SPEC, served by tapdisk; the vbd is
# made by hand.
guest_on_image() {
    blkback off
    guest_create "$1" "$2"
    vbd_make "$GUEST_ID" xvda
    tapdisk_start "$GUEST_ID/xvda=$3"
    guest_run "$1" "$4" || fail "the script of guest $1"
    tapdisk_wait
    vbd_remove
}
