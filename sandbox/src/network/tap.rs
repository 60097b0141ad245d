//! A tap device joined to an interface: what arrives at the one leaves through the other.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirrorOption, TcActionOption, TcActionType,
    TcAttribute, TcFilterMatchAllOption, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption,
};

use super::NetworkError;
use super::interfaces::Interface;
use super::netlink::Netlink;
use crate::fault::{self, Step};

/// Priority of the filter, by which it is told from another's, and `ETH_P_ALL` in network byte order
/// (linux/if_ether.h).
const FILTER_INFO: u32 = (0xb01d << 16) | 0x0300;

/// What the names of taps begin with; the slot follows.
pub(super) const PREFIX: &str = "bulkhead";

/// `ffff:`, the handle of an ingress queue.
const INGRESS: TcHandle = TcHandle {
    major: u16::MAX,
    minor: 0,
};

/// A tap that is joined to an interface.
#[derive(Debug)]
pub(super) struct Joined {
    /// Queues of the tap device; all but the first are detached.
    pub taps: Vec<OwnedFd>,
    /// Index of the tap device.
    pub index: u32,
}

mod ioctl {
    nix::ioctl_write_ptr_bad!(
        set_interface,
        nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
        libc::ifreq
    );
    nix::ioctl_write_ptr_bad!(
        set_queue,
        nix::request_code_write!(b'T', 217, size_of::<libc::c_int>()),
        libc::ifreq
    );
}

/// Makes a tap device with so many queues for `interface` and redirects frames both ways. The device goes with its
/// descriptors.
pub(super) fn create(
    netlink: &mut Netlink,
    interface: &Interface,
    slot: u32,
    queues: u8,
) -> Result<Joined, NetworkError> {
    let name = format!("{PREFIX}{slot}");
    let tap = make(netlink, interface, &name, queues)?;
    redirect(netlink, interface.index, tap.index, &interface.name)?;
    redirect(netlink, tap.index, interface.index, &name)?;
    Ok(tap)
}

/// Makes a tap device like `interface`, which is joined to nothing yet.
pub(super) fn make(
    netlink: &mut Netlink,
    interface: &Interface,
    name: &str,
    queues: u8,
) -> Result<Joined, NetworkError> {
    let failed = |error| NetworkError::Tap {
        interface: interface.name.clone(),
        error,
    };
    let taps = open(name, queues).map_err(failed)?;
    let index = index_of(name).map_err(failed)?;
    if taps.len() > 1 {
        send_at_once(netlink, index, name)?;
    }
    set_mtu(netlink, index, name, interface.mtu)?;
    Ok(Joined { taps, index })
}

/// Has a tap of several queues, which is still down, take frames without a queueing discipline. It would get one for each of
/// the 256 queues that the kernel lets it have, 6 MiB in all, and none would ever hold a frame: a full tap drops.
fn send_at_once(netlink: &mut Netlink, index: u32, name: &str) -> Result<(), NetworkError> {
    let mut discipline = TcMessage::with_index(index.cast_signed());
    discipline.header.parent = TcHandle::ROOT;
    discipline.attributes.push(TcAttribute::Kind("noqueue".into()));
    netlink.change(
        &format!("take the queueing discipline from {name}"),
        RouteNetlinkMessage::NewQueueDiscipline(discipline),
        true,
    )
}

/// Brings a tap up with the MTU of its interface.
pub(super) fn set_mtu(netlink: &mut Netlink, index: u32, name: &str, mtu: u16) -> Result<(), NetworkError> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link.attributes.push(LinkAttribute::Mtu(mtu.into()));
    netlink.change(
        &format!("bring {name} up"),
        RouteNetlinkMessage::SetLink(link),
        false,
    )
}

/// Makes a tap device. Of several queues all but the first are detached: nobody takes frames from them yet.
fn open(name: &str, queues: u8) -> io::Result<Vec<OwnedFd>> {
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if queues < 2 {
        return Ok(vec![open_queue(name, flags)?]);
    }
    let flags = flags | libc::IFF_MULTI_QUEUE;
    // The first makes the device, and does not join one that is there.
    let mut taps = vec![open_queue(name, flags | libc::IFF_TUN_EXCL)?];
    for _ in 1..queues {
        let tap = open_queue(name, flags)?;
        let request = request("", libc::IFF_DETACH_QUEUE)?;
        // SAFETY: TUNSETQUEUE reads an ifreq, which outlives the call.
        unsafe { ioctl::set_queue(tap.as_raw_fd(), &raw const request) }?;
        taps.push(tap);
    }
    Ok(taps)
}

fn open_queue(name: &str, flags: libc::c_int) -> io::Result<OwnedFd> {
    let tap = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    let request = request(name, flags)?;
    // SAFETY: TUNSETIFF reads an ifreq, which outlives the call.
    unsafe { ioctl::set_interface(tap.as_raw_fd(), &raw const request) }?;
    Ok(tap.into())
}

fn request(name: &str, flags: libc::c_int) -> io::Result<libc::ifreq> {
    // SAFETY: an all-zero ifreq is a valid value of that plain struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = u16::try_from(flags).map_err(io::Error::other)?;
    request.ifr_ifru.ifru_flags = flags.cast_signed();
    Ok(request)
}

fn index_of(name: &str) -> io::Result<u32> {
    Ok(nix::net::if_::if_nametoindex(name)?)
}

/// Makes sure that an interface has no ingress queue, so that one found there later is ours. A redirection that a
/// sandbox has left is removed: nobody else uses the namespace now.
///
/// # Errors
/// There is a queue of somebody else's.
pub(super) fn clear(netlink: &mut Netlink, interface: &Interface) -> Result<(), NetworkError> {
    let (index, name) = (interface.index, &interface.name);
    if !has_queue(netlink, index, name)? {
        return Ok(());
    }
    delete_redirection(netlink, index, name)?;
    if has_queue(netlink, index, name)? {
        return Err(NetworkError::Refused {
            what: format!("add an ingress queue to {name}"),
            error: std::io::Error::from_raw_os_error(libc::EEXIST),
        });
    }
    Ok(())
}

/// Everything that arrives at interface `from`, which has no ingress queue, leaves through `to`.
fn redirect(netlink: &mut Netlink, from: u32, to: u32, name: &str) -> Result<(), NetworkError> {
    netlink.change(
        &format!("add an ingress queue to {name}"),
        RouteNetlinkMessage::NewQueueDiscipline(queue(from)),
        true,
    )?;
    let redirected = fault::point(Step::InterfaceQueued)
        .map_err(|error| NetworkError::Step(Step::InterfaceQueued, error))
        .and_then(|()| add_filter(netlink, from, to, name));
    if redirected.is_err()
        && let Err(error) = delete_queue(netlink, from, name)
    {
        log::warn!("{}", crate::error::chain(&error));
    }
    redirected
}

fn add_filter(netlink: &mut Netlink, from: u32, to: u32, name: &str) -> Result<(), NetworkError> {
    let mut generic = TcActionGeneric::default();
    generic.action = TcActionType::Stolen;
    let mut mirror = TcMirror::default();
    mirror.generic = generic;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind("mirred".into()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    let mut filter = filter(from);
    filter.attributes = vec![
        TcAttribute::Kind("matchall".into()),
        TcAttribute::Options(vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(vec![
            action,
        ]))]),
    ];
    netlink.change(
        &format!("redirect frames from {name}"),
        RouteNetlinkMessage::NewTrafficFilter(filter),
        true,
    )
}

/// Gives an interface back as the network plugin made it. One that is not redirected is left alone. It had no ingress queue
/// before: an empty one is what a sandbox has left that was killed before it redirected anything.
pub(super) fn restore(netlink: &mut Netlink, index: u32, name: &str) -> Result<(), NetworkError> {
    if delete_redirection(netlink, index, name)? || has_filters(netlink, index, name)? {
        return Ok(());
    }
    delete_queue(netlink, index, name)
}

/// Removes our filter and its queue; whether there was one.
fn delete_redirection(netlink: &mut Netlink, index: u32, name: &str) -> Result<bool, NetworkError> {
    let message = RouteNetlinkMessage::DelTrafficFilter(filter(index));
    let deleted = netlink.change(&format!("remove the redirection of {name}"), message, false);
    if unless_absent(deleted)?.is_none() {
        return Ok(false);
    }
    delete_queue(netlink, index, name)?;
    Ok(true)
}

/// Removes the ingress queue, if there is one.
fn delete_queue(netlink: &mut Netlink, index: u32, name: &str) -> Result<(), NetworkError> {
    let message = RouteNetlinkMessage::DelQueueDiscipline(queue(index));
    let deleted = netlink.change(&format!("remove the ingress queue of {name}"), message, false);
    unless_absent(deleted).map(drop)
}

fn has_queue(netlink: &mut Netlink, index: u32, name: &str) -> Result<bool, NetworkError> {
    let message = RouteNetlinkMessage::GetQueueDiscipline(queue(index));
    let found = netlink.change(&format!("look at the ingress queue of {name}"), message, false);
    Ok(unless_absent(found)?.is_some())
}

/// Whether anybody's filter is on the ingress queue.
fn has_filters(netlink: &mut Netlink, index: u32, name: &str) -> Result<bool, NetworkError> {
    let mut every = TcMessage::with_index(index.cast_signed());
    every.header.parent = INGRESS;
    let what = format!("list the filters of {name}");
    match netlink.dump(&what, RouteNetlinkMessage::GetTrafficFilter(every)) {
        // One of a kind that cannot be read is somebody else's.
        Err(NetworkError::Decode(_)) => Ok(true),
        list => Ok(unless_absent(list)?.is_some_and(|list| !list.is_empty())),
    }
}

/// Nothing when the kernel knows no such filter, no such queue or no such interface.
fn unless_absent<T>(answer: Result<T, NetworkError>) -> Result<Option<T>, NetworkError> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(NetworkError::Refused { error, .. })
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn queue(index: u32) -> TcMessage {
    let mut queue = TcMessage::with_index(index.cast_signed());
    queue.header.handle = INGRESS;
    queue.header.parent = TcHandle::INGRESS;
    queue.attributes.push(TcAttribute::Kind("ingress".into()));
    queue
}

fn filter(index: u32) -> TcMessage {
    let mut filter = TcMessage::with_index(index.cast_signed());
    filter.header.parent = INGRESS;
    filter.header.info = FILTER_INFO;
    filter
}
