//! A tap device joined to an interface: what arrives at the one leaves through the other.

use std::fs::File;
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

/// Priority of the only filter, and `ETH_P_ALL` in network byte order (linux/if_ether.h).
const FILTER_INFO: u32 = (1 << 16) | 0x0300;

mod ioctl {
    nix::ioctl_write_ptr_bad!(
        set_interface,
        nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
        libc::ifreq
    );
}

/// Makes a tap device for `interface` and redirects frames both ways. The device goes with its descriptor.
pub(super) fn create(
    netlink: &mut Netlink,
    interface: &Interface,
    number: usize,
) -> Result<OwnedFd, NetworkError> {
    let name = format!("bulkhead{number}");
    let tap = open(&name).map_err(|error| NetworkError::Tap {
        interface: interface.name.clone(),
        error,
    })?;
    let index = index_of(&name).map_err(|error| NetworkError::Tap {
        interface: interface.name.clone(),
        error,
    })?;
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link.attributes.push(LinkAttribute::Mtu(interface.mtu.into()));
    netlink.change(
        &format!("bring {name} up"),
        RouteNetlinkMessage::SetLink(link),
        false,
    )?;
    for (from, to, from_name) in [
        (interface.index, index, interface.name.as_str()),
        (index, interface.index, name.as_str()),
    ] {
        redirect(netlink, from, to, from_name)?;
    }
    Ok(tap)
}

/// Whether the interface has an ingress queue, which only one can have.
pub(super) fn is_taken(netlink: &mut Netlink, interface: &Interface) -> Result<bool, NetworkError> {
    let index = i32::try_from(interface.index).unwrap_or(i32::MAX);
    let found = netlink.dump(
        &format!("list the queues of {}", interface.name),
        RouteNetlinkMessage::GetQueueDiscipline(TcMessage::with_index(index)),
    )?;
    // A kernel may answer with the queues of all interfaces.
    Ok(found.iter().any(|answer| match answer {
        RouteNetlinkMessage::NewQueueDiscipline(queue) => {
            queue.header.index == index && queue.header.parent == TcHandle::INGRESS
        }
        _ => false,
    }))
}

/// Takes the ingress queue away, and with it the redirection. None is no error.
pub(super) fn release(netlink: &mut Netlink, index: u32, name: &str) -> Result<(), NetworkError> {
    let queue = ingress(i32::try_from(index).unwrap_or(i32::MAX));
    let result = netlink.change(
        &format!("take the ingress queue from {name}"),
        RouteNetlinkMessage::DelQueueDiscipline(queue),
        false,
    );
    match result {
        // No such queue: it was never made, or has been taken away.
        Err(NetworkError::Refused { error, .. })
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)
            ) =>
        {
            Ok(())
        }
        result => result,
    }
}

fn ingress(index: i32) -> TcMessage {
    let mut queue = TcMessage::with_index(index);
    queue.header.handle = TcHandle {
        major: u16::MAX,
        minor: 0,
    };
    queue.header.parent = TcHandle::INGRESS;
    queue.attributes.push(TcAttribute::Kind("ingress".into()));
    queue
}

fn open(name: &str) -> std::io::Result<OwnedFd> {
    let tap = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: an all-zero ifreq is a valid value of that plain struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(std::io::Error::other)?;
    // SAFETY: TUNSETIFF reads an ifreq, which outlives the call.
    unsafe { ioctl::set_interface(tap.as_raw_fd(), &raw const request) }?;
    Ok(tap.into())
}

fn index_of(name: &str) -> std::io::Result<u32> {
    Ok(nix::net::if_::if_nametoindex(name)?)
}

/// Everything that arrives at interface `from` leaves through `to`.
fn redirect(netlink: &mut Netlink, from: u32, to: u32, name: &str) -> Result<(), NetworkError> {
    let index = i32::try_from(from).unwrap_or(i32::MAX);
    netlink.change(
        &format!("add an ingress queue to {name}"),
        RouteNetlinkMessage::NewQueueDiscipline(ingress(index)),
        true,
    )?;

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
    let mut filter = TcMessage::with_index(index);
    filter.header.parent = TcHandle {
        major: u16::MAX,
        minor: 0,
    };
    filter.header.info = FILTER_INFO;
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
