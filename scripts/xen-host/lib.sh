# Functions for scripts in dom0:  . /xen-host/lib.sh

# fail MESSAGE: ends the script.
fail() {
    echo "failed: $*" >&2
    exit 1
}

# wait_for SECONDS COMMAND...: until the command succeeds.
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

# guest_create NAME SCRIPT [LINE...]: makes a paused PV guest that runs SCRIPT (by sh -eu) and powers off. Each LINE
# goes into its xl configuration: disk = [ 'phy:/dev/loop0,xvda,w' ]. Its domain id is in $GUEST_ID.
guest_create() {
    local name=$1 script=$2 folder
    shift 2
    folder=/tmp/guest-$name
    rm -rf "$folder"
    mkdir -p "$folder/root"
    cp /xen-host/domu-init "$folder/root/init"
    cp "$script" "$folder/root/run.sh"
    # Archives in a row: what is in the later goes over the earlier.
    (cd "$folder/root" && find . | cpio -o -H newc 2> /dev/null) | cat /domu/base.cpio - > "$folder/initrd"
    {
        printf '%s\n' "name = '$name'" "type = 'pv'" "kernel = '/domu/vmlinux'" "ramdisk = '$folder/initrd'"
        printf '%s\n' "extra = 'console=hvc0 quiet'" "memory = 192" "vcpus = 1"
        printf '%s\n' "on_poweroff = 'destroy'" "on_crash = 'destroy'" "$@"
    } > "$folder/config"
    xl create -p "$folder/config" || fail "create guest $name"
    GUEST_ID=$(xl domid "$name")
}

guest_gone() { ! xl domid "$1"; }

# guest_log NAME: what it wrote to its console.
guest_log() { tr -d '\r' < "/var/log/xen/guest-$1.log"; }

# guest_run NAME SECONDS: lets it run to its end, shows its console; succeeds if its script did.
guest_run() {
    xl unpause "$1"
    wait_for "$2" guest_gone "$1"
    guest_log "$1"
    guest_log "$1" | grep -q '^@guest exit 0$'
}
