// What the app uses of SwiftUI, by names and types alone: enough to type-check it where there is no Apple SDK.
@_exported import Foundation
import UniformTypeIdentifiers

@MainActor @preconcurrency public protocol View {
    associatedtype Body: View
    @ViewBuilder @MainActor @preconcurrency var body: Body { get }
}
extension Never: View { public var body: Never { return fatalError() } }
public struct Group0: View { public var body: Never { return fatalError() } }

@resultBuilder public enum ViewBuilder {
    public static func buildBlock<each V: View>(_ views: repeat each V) -> Group0 { fatalError() }
    public static func buildExpression<V: View>(_ view: V) -> V { view }
}

@MainActor @preconcurrency public protocol Scene {}
@resultBuilder public enum SceneBuilder { public static func buildBlock<S: Scene>(_ scene: S) -> S { scene } }
@MainActor @preconcurrency public protocol App {
    associatedtype Body: Scene
    @SceneBuilder var body: Body { get }
    init()
}
extension App { public static func main() {} }
public struct WindowGroup: Scene { public init<V: View>(@ViewBuilder _ content: () -> V) {} }

public protocol ObservableObject: AnyObject {}
@propertyWrapper public struct Published<T> {
    public var wrappedValue: T
    public init(wrappedValue: T) { self.wrappedValue = wrappedValue }
}
@propertyWrapper public struct Binding<T> {
    public init(wrappedValue: T) { self.wrappedValue = wrappedValue }
    public var wrappedValue: T
}
@propertyWrapper public struct State<T> {
    public init(wrappedValue: T) { fatalError() }
    public var wrappedValue: T {
        get { fatalError() }
        nonmutating set {}
    }
    public var projectedValue: Binding<T> { fatalError() }
}
@propertyWrapper @MainActor @preconcurrency public struct StateObject<T: ObservableObject> {
    public nonisolated init(wrappedValue: @autoclosure @escaping () -> T) {}
    public var wrappedValue: T { fatalError() }
}

public struct HorizontalAlignment { public static let leading = HorizontalAlignment() }
public struct Alignment { public static let leading = Alignment(), center = Alignment() }
public struct Font { public static let footnote = Font() }
public enum Axis { case horizontal, vertical }
public struct EnabledTextSelectability { public static var enabled: Self { fatalError() } }

public struct VStack: View {
    public init<V: View>(alignment: HorizontalAlignment, spacing: Double?, @ViewBuilder _ content: () -> V) {}
    public var body: Never { return fatalError() }
}
public struct HStack: View {
    public init<V: View>(@ViewBuilder _ content: () -> V) {}
    public var body: Never { return fatalError() }
}
public struct ScrollView: View {
    public init<V: View>(@ViewBuilder _ content: () -> V) {}
    public var body: Never { return fatalError() }
}
public struct Spacer: View {
    public init() {}
    public var body: Never { return fatalError() }
}
public struct Text: View {
    public init(_ text: String) {}
    public var body: Never { return fatalError() }
}
public struct Button: View {
    public init(_ title: String, action: @escaping @MainActor () -> Void) {}
    public var body: Never { return fatalError() }
}
public struct TextField: View {
    public init(_ title: String, text: Binding<String>, axis: Axis) {}
    public var body: Never { return fatalError() }
}
extension View {
    public func disabled(_ flag: Bool) -> some View { Spacer() }
    public func font(_ font: Font?) -> some View { Spacer() }
    public func textSelection(_ selectability: EnabledTextSelectability) -> some View { Spacer() }
    public func frame(maxWidth: Double?, alignment: Alignment) -> some View { Spacer() }
    public func padding() -> some View { Spacer() }
    public func task(_ action: @escaping @Sendable @MainActor () async -> Void) -> some View { Spacer() }
    public func fileImporter(
        isPresented: Binding<Bool>, allowedContentTypes: [UTType],
        onCompletion: @escaping (Result<URL, any Error>) -> Void
    ) -> some View { Spacer() }
}
