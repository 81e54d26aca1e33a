# the Debian package in dom0: installed, upgraded and removed under a busy guest of xl; no capability, no young system call
. /xen-host/lib.sh

cat > guest.sh <<'GUEST'
. /guest-lib.sh
disk_wait xvda
disk-load verify /dev/xvda --depth 8 --until-told
disk_hash xvda
GUEST

# daemon LAUNCHER...: starts the daemon as its unit does: root without capabilities.
daemon() {
    setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@" /usr/bin/tapdisk xen --watch >> tapdisk.log 2>&1 &
    TAPDISK=$!
}
runs_installed() { [ "$(stat -L -c %i "/proc/$TAPDISK/exe")" = "$(stat -c %i /usr/bin/tapdisk)" ]; }
clean_up() {
    dpkg --install /xen-host/tapdisk.deb
}

dpkg-query --show tapdisk
[ "$(command -v tapdisk)" = /usr/bin/tapdisk ] || fail "another tapdisk is in the way"
mkdir images
tap-img create -f qcow images/disk.qcow 32M
# A package of the same files with a higher version; not compressed, which takes long here.
dpkg-deb --raw-extract /xen-host/tapdisk.deb newer
sed -i 's/^Version: .*/&.1/' newer/DEBIAN/control
dpkg-deb -Znone --build newer newer.deb

trap 'guest_clean_up deploy clean_up' EXIT
blkback off
daemon
guest_create deploy guest.sh \
    "disk = [ 'script=block-tapdisk,vdev=xvda,access=w,target=qcow:$PWD/images/disk.qcow' ]"
xl unpause deploy
guest_goes_on deploy

echo "# upgrade while the guest writes"
dpkg --install newer.deb > dpkg.log 2>&1 || fail "the upgrade: $(cat dpkg.log)"
cat dpkg.log
grep -q "process $TAPDISK still runs the old program.*: /usr/bin/tapdisk xen --watch" dpkg.log ||
    fail "nothing is said about the old program"
if runs_installed; then fail "the daemon cannot run the new program yet"; fi
guest_goes_on deploy
kill "$TAPDISK"
tapdisk_wait
daemon
wait_for 20 runs_installed
guest_goes_on deploy

echo "# the new daemon is killed, and the next one has no system call that is younger than Linux 4.19"
kill -9 "$TAPDISK"
tapdisk_wait 137
daemon old-kernel
wait_for 20 runs_installed
guest_goes_on deploy
grep -q 'the kernel refuses io_uring' tapdisk.log || fail "it does not say that it uses threads"

echo "# removal is refused while the guest needs its disk"
if dpkg --remove tapdisk > dpkg.log 2>&1; then fail "the package was removed under a guest"; fi
cat dpkg.log
grep -q "process $TAPDISK: /usr/bin/tapdisk xen --watch" dpkg.log || fail "it does not say which process is in the way"
guest_goes_on deploy

guest_tell deploy stop
wait_for 100 guest_gone deploy
guest_log deploy | grep -v 'goes on'
guest_said deploy '^@load compared .*MISMATCHES 0$' || fail "the guest's load"
guest_said deploy '^@guest exit 0$' || fail "the guest's script"
kill "$TAPDISK"
tapdisk_wait
tap-img check images/disk.qcow || [ $? = 3 ] || fail "the image is damaged"
tap-img convert images/disk.qcow disk.raw
[ "$(guest_hash deploy xvda)" = "$(hash_of disk.raw)" ] || fail "the image has other data than the guest saw"

echo "# removed, and purged"
dpkg --remove tapdisk
[ ! -e /usr/bin/tapdisk ] || fail "a removed program is still there"
[ -e /etc/xen/scripts/block-tapdisk ] || fail "removal took a configuration file away"
dpkg --purge tapdisk
for file in /etc/xen/scripts/block-tapdisk /etc/default/tapdisk-xen /usr/share/doc/tapdisk; do
    [ ! -e "$file" ] || fail "$file is left"
done
