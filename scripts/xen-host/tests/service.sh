# the units under systemd, with all that they deny: guests and NBD clients served, restart and upgrade under a busy guest
. /xen-host/lib.sh

cat > guest.sh <<'GUEST'
. /guest-lib.sh
disk_wait xvda
disk-load verify /dev/xvda --depth 8 --until-told
disk_hash xvda
GUEST

log=/var/log/tapdisk-units.log
# systemd_start: systemd as the first process of a namespace of its own, which ends with it.
systemd_start() {
    mkdir -p /sys/fs/cgroup /etc/systemd/system
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    # It would hide a /run that is not mounted, and xenstored's socket in it.
    mount -o bind /run /run
    echo 0123456789abcdef0123456789abcdef > /etc/machine-id
    # There is no journal here.
    for unit in tapdisk-xen tapdisk-nbd@; do
        mkdir -p "/etc/systemd/system/$unit.service.d"
        printf '%s\n' '[Service]' "StandardOutput=append:$log" "StandardError=append:$log" \
            > "/etc/systemd/system/$unit.service.d/log.conf"
    done
    container=other unshare -p -f -m --mount-proc=/proc \
        /usr/lib/systemd/systemd --unit=multi-user.target --log-target=console --log-level=notice --show-status=no &
    wait_for 60 test -S /run/systemd/private
    SYSTEMD=$(pidof systemd)
    wait_for 60 inside systemctl is-active multi-user.target
}
# inside COMMAND...: runs it where systemd's processes have the numbers that it knows. A name alone may be busybox's.
inside() { nsenter -t "$SYSTEMD" -m -p -- "$@"; }
systemd_stop() {
    inside systemctl stop tapdisk-xen 'tapdisk-nbd@*'
    kill -9 "$SYSTEMD"
    rm -rf /run/systemd /run/tapdisk-nbd /etc/systemd/system /etc/machine-id
    umount /run
    umount /sys/fs/cgroup
    dpkg --install /xen-host/tapdisk.deb
}
clean_up() {
    {
        cat "$log"
        inside systemctl --no-pager status tapdisk-xen
    } > service.log 2>&1
    systemd_stop
}
main_pid() { inside systemctl show --property MainPID --value "$1"; }
runs_installed() { inside sh -c 'test "$(stat -L -c %i "/proc/$0/exe")" = "$(stat -c %i /usr/bin/tapdisk)"' "$(main_pid "$1")"; }

mkdir -p /srv/images
tap-img create -f qcow /srv/images/guest.qcow 32M
tap-img create -f qcow /srv/images/disk.qcow 16M
dpkg-deb --raw-extract /xen-host/tapdisk.deb newer
sed -i 's/^Version: .*/&.1/' newer/DEBIAN/control
dpkg-deb -Znone --build newer newer.deb

ln -sf "$log" tapdisk.log
trap 'guest_clean_up service clean_up' EXIT
blkback off
systemd_start

echo "# a first installation starts the daemon"
inside /usr/bin/dpkg --purge tapdisk
inside /usr/bin/dpkg --install /xen-host/tapdisk.deb
inside systemctl is-enabled tapdisk-xen
wait_for 20 runs_installed tapdisk-xen
# What the unit denies is in force: no capability, and a filter of system calls.
inside cat "/proc/$(main_pid tapdisk-xen)/status" > status
grep -q '^CapBnd:[[:space:]]*0*$' status && grep -q '^CapEff:[[:space:]]*0*$' status || fail "it has capabilities"
grep -q '^Seccomp:[[:space:]]*2$' status || fail "no system call is denied"
guest_create service guest.sh \
    "disk = [ 'script=block-tapdisk,vdev=xvda,access=w,target=qcow:/srv/images/guest.qcow' ]"
xl unpause service
guest_goes_on service

echo "# restart while the guest writes"
before=$(main_pid tapdisk-xen)
inside systemctl restart tapdisk-xen
[ "$(main_pid tapdisk-xen)" != "$before" ] || fail "the daemon was not restarted"
guest_goes_on service

echo "# the daemon dies, and systemd starts the next one"
before=$(main_pid tapdisk-xen)
inside kill -9 "$before"
is_another() { [ "$(main_pid tapdisk-xen)" != 0 ] && [ "$(main_pid tapdisk-xen)" != "$before" ]; }
wait_for 30 is_another
guest_goes_on service

echo "# an NBD server, as its user"
mkdir -p /etc/tapdisk
cp /usr/share/doc/tapdisk/examples/nbd.conf /etc/tapdisk/disk.conf
chown tapdisk: /srv/images/disk.qcow
inside systemctl start tapdisk-nbd@disk
socket=/run/tapdisk-nbd/disk/socket
wait_for 20 test -S "$socket"
head -c 1048576 /dev/urandom > source
truncate -s 16M source
tap-img convert -n source "nbd:unix:$socket"
tap-img compare source "nbd:unix:$socket"

echo "# upgrade: the daemon of guests is restarted, NBD servers are not"
server=$(main_pid tapdisk-nbd@disk)
inside /usr/bin/dpkg --install "$PWD/newer.deb" > dpkg.log 2>&1 || fail "the upgrade: $(cat dpkg.log)"
cat dpkg.log
wait_for 20 runs_installed tapdisk-xen
guest_goes_on service
grep -q "process $server still runs the old program" dpkg.log || fail "nothing is said about the NBD server"
[ "$(main_pid tapdisk-nbd@disk)" = "$server" ] || fail "the NBD server was restarted"
tap-img compare source "nbd:unix:$socket"

echo "# removal is refused while disks are served"
if inside /usr/bin/dpkg --remove tapdisk > dpkg.log 2>&1; then fail "the package was removed under a guest"; fi
cat dpkg.log
guest_goes_on service
guest_tell service stop
wait_for 100 guest_gone service
guest_log service | grep -v 'goes on'
guest_said service '^@load compared .*MISMATCHES 0$' || fail "the guest's load"
inside systemctl stop tapdisk-nbd@disk
[ "$(inside systemctl is-active tapdisk-xen)" = active ] || fail "the daemon is not running any more"

echo "# an NBD server keeps the package, and the idle daemon stays"
inside systemctl start tapdisk-nbd@disk
if inside /usr/bin/dpkg --remove tapdisk > dpkg.log 2>&1; then fail "the package was removed under an NBD server"; fi
[ "$(inside systemctl is-active tapdisk-xen)" = active ] || fail "a refused removal has stopped the daemon"
inside systemctl stop tapdisk-nbd@disk

echo "# an idle daemon is stopped by the removal, and started by the next installation"
inside /usr/bin/dpkg --remove tapdisk
[ ! -e /usr/bin/tapdisk ] || fail "a removed program is still there"
inside /usr/bin/dpkg --install /xen-host/tapdisk.deb
wait_for 20 runs_installed tapdisk-xen
inside /usr/bin/dpkg --remove tapdisk
inside /usr/bin/dpkg --purge tapdisk
[ ! -e /var/lib/tapdisk ] || fail "a purge leaves /var/lib/tapdisk"
[ ! -e /etc/systemd/system/multi-user.target.wants/tapdisk-xen.service ] || fail "the unit is still enabled"
inside /usr/bin/dpkg --install /xen-host/tapdisk.deb
tap-img convert /srv/images/guest.qcow guest.raw
[ "$(guest_hash service xvda)" = "$(hash_of guest.raw)" ] || fail "the image has other data than the guest saw"
